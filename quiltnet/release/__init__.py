"""What leaves the house: loading, exporting."""
