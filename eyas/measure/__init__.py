"""How well a draft agrees with its target on any text. Shows nothing and judges nothing."""
