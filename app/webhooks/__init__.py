"""Webhooks by the Standard Webhooks specification: endpoints of clients, deliveries, and who sends them."""
