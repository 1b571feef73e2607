"""What of causal attention of chosen rows is written in Gluon for Hopper cards."""
