"""What tests share: models to convert, files put together by hand, outside judges."""
