"""The one reader of a finished run: typed records for the report, the viewer and the exports."""
