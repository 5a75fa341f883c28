"""All that the coordinator knows, as data with small queries. Nothing here decides, and nothing does I/O."""
