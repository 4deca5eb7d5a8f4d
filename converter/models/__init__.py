"""What lies in a folder by names and headers: weight sets, components, and which of them are meant."""
