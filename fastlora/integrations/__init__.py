"""Bridges to other libraries. Each is an explicit call; importing one patches nothing."""
