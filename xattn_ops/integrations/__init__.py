"""The operators inside other libraries' models; importing this imports none of them."""
