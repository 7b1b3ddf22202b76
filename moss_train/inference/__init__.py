"""Files and corpora to codes and back."""
