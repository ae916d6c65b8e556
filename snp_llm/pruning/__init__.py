"""The method: what every width would cost, how many units stay, the sequential loop."""
