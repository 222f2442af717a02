"""In which dtype state is stored, computed with, summed and scaled."""
