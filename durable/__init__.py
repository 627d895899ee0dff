"""What keeps files and processes whole: one writer a folder, signals, peers that are gone. No torch."""
