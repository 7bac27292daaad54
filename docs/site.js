// Names and keyboard access that the theme's scripts leave out, for readers with a screen reader or without a mouse: the
// search dialog, each code block's own group of buttons, and code wider than the page. The theme adds blocks' buttons
// while the page scrolls, so what is added later is seen to as well.
(() => {
  const chinese = document.documentElement.lang.startsWith("zh");
  function mend() {
    document.querySelectorAll(".md-search[role=dialog]").forEach((one) => one.setAttribute("aria-label", chinese ? "搜索" : "Search"));
    document.querySelectorAll("nav.md-code__nav").forEach((one, i) => one.setAttribute("aria-label", `${chinese ? "代码" : "Code"} ${i + 1}`));
    document.querySelectorAll("pre > code, .md-typeset__scrollwrap").forEach((one) => {
      if (one.scrollWidth > one.clientWidth) one.tabIndex = 0;
    });
  }
  let waiting = false;
  function soon() {
    if (!waiting) requestAnimationFrame(() => ((waiting = false), mend()));
    waiting = true;
  }
  addEventListener("resize", soon);
  new MutationObserver(soon).observe(document.documentElement, {childList: true, subtree: true});
  soon();
})();
