"""Paged keys of a batch that is decoded: which slots a query sees, and tables of pages."""
