// OHIF 3.13 on a DICOMweb server of the same origin, as the tests open it. Of a site's own file only these lines matter:
// the address of the PACS's DICOMweb, and full answers in place of thumbnails rendered by the PACS.
window.config = {
  routerBasename: '/',
  extensions: [],
  modes: [],
  customizationService: [],
  showStudyList: true,
  maxNumberOfWebWorkers: 2,
  investigationalUseDialog: { option: 'never' },
  // A double click on a SEG or SR loads it; otherwise OHIF asks first.
  disableConfirmationPrompts: true,
  defaultDataSourceName: 'pacs',
  dataSources: [
    {
      namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
      sourceName: 'pacs',
      configuration: {
        friendlyName: 'PACS',
        name: 'pacs',
        qidoRoot: '/dicom-web',
        wadoRoot: '/dicom-web',
        wadoUriRoot: '/dicom-web',
        qidoSupportsIncludeField: false,
        supportsFuzzyMatching: false,
        supportsWildcard: true,
        enableStudyLazyLoad: true,
        imageRendering: 'wadors',
        thumbnailRendering: 'wadors',
        omitQuotationForMultipartRequest: true,
        bulkDataURI: { enabled: true },
      },
    },
  ],
};
