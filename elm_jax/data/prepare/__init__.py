"""Raw downloads to records: one module per dataset, what they share in `output` and `splits`."""
