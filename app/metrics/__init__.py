"""What Prometheus reads.

`counted`: what this process saw happen. `stored`: what the database knows, asked when somebody scrapes.
`requests`: HTTP. `port`: where all of it is read. A new domain adds its own in the first two.
"""
