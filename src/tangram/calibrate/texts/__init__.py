"""The texts that calibration reads: built in, from files, from the Hub."""
