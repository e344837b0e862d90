"""What `elm_jax.plan` is made of: a topology, the compiled train step, its HLO, a roofline, a search."""
