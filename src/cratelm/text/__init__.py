"""Text for people: tokens and corpus text made visible, and tables written once for every format."""
