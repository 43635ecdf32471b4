"""A tiny checkpoint, test doubles and checks that several tests share."""
