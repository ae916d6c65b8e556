"""What every program needs: devices, ranks, files, the terminal. Knows no models."""
