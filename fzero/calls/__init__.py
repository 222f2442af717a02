"""What calls take: arguments in their range, names that are near, leaves by pattern; and how values print."""
