"""Translation over HTTP: the interface of LibreTranslate, and a page that shows the passes."""
