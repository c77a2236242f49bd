"""Problems: small readable descriptions of calls of the op, and what Hypothesis may draw of them."""
