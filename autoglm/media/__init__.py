"""What a client sends besides text, turned into the arrays the encoders take."""
