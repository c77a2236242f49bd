"""Problems: small readable descriptions of calls of the op, and the strategies that draw them."""
