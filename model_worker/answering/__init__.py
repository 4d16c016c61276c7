"""Text as it comes, then its sources."""
