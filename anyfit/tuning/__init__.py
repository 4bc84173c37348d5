"""What makes a chosen configuration better: its codes and scales, never its formats."""
