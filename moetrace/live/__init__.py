"""A recording while it goes on: what was counted lately, as metrics, as a page, request by request."""
