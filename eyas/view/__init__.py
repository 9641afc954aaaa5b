"""What people see: an answer with its drafted tokens coloured, a round told step by step. Knows results; changes nothing."""
