"""What an operator or an owner does: backup, calibrate, doctor, export, filter tasks, join, keys, roll back."""
