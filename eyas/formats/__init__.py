"""The layouts that engines read a draft in: one file an engine, written and read, and what to check between them."""
