"""Many requests through one model at once. Knows neither HTTP nor Ray."""
