"""How large a round's trees should be: prices, chances, pauses, and where what was learned is kept. The text never depends on it."""
