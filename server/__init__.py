"""Online serving: API -> variants -> engine processes -> metrics."""
