"""Operations on the compressed cache; every one has a plain-torch reference beside it."""
