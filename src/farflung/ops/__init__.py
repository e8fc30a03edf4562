"""Commands of an operator or an owner: backup, calibrate, doctor, export, filter tasks, join, keys, roll back."""
