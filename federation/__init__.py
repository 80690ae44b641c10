"""Peers: finding other nodes, comparing inventories, and copying cards that are verified before anyone sees them."""
