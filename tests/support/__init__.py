"""What tests share: servers, models, factories of rows, a runner that follows a script."""
