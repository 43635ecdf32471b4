"""A tiny checkpoint, stand-ins and checks that several tests share."""
