"""From answers and truths to numbers: metrics, protocols, statistics. Pure: strings and numbers."""
