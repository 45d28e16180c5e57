"""What every route stands on: problems, pages, middleware, the OpenAPI document."""
