"""The night: noticing what no card fits, and growing a card for it. Nothing is built yet; see CHANGELOG."""
