"""Operations with a backward of their own, one folder each; imported only by what asks for them."""
