"""What proposes: one file a way of guessing the target's next tokens, all behind `decode.drafter.Drafter`."""
