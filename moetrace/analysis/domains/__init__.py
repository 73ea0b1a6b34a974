"""Whether domains use different experts, which experts, and in which layers."""
