"""Predictions in reports: columns of the tidy table, rows and notes of the section."""
