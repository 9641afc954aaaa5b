"""What is wrong with a draft: its files, how it is read, how it does in a running engine."""
