"""Small real data, reference networks and a LightningModule for the command line and the tests."""
