"""The harmony format at token level: conversations to tokens, sampled tokens to events."""
