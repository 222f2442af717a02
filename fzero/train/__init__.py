"""The state of training, and the step that makes the next one."""
