"""The tar format of samples: writing it byte for byte, and reading it strictly."""
