"""Which K holds a quality target on a sample of the user's own data; see ``jobs.calibrate``."""
